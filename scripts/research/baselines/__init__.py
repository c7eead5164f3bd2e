"""What other systems do on the same machine: swapping, paging, ZeRO-3."""
