"""What a recipe needs of GPUs: operations, memory, traffic, time."""
