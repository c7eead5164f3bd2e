"""The recorded trace and the layers that it is cut into."""
