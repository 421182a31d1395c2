"""The needs of a training recipe: floating-point operations, memory, network traffic and time."""
