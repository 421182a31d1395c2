"""Estimates of the floating-point operations, memory, network traffic and time that a training recipe needs."""
