"""The virtual GPU: built, loaded, configured; its access trace checked for races."""
