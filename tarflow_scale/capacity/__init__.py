"""What a training recipe needs: floating-point operations, memory, network traffic and time."""
