"""What lies in host memory: parameters, gradients, optimizer state, boundary values."""
