"""What models and machines are like, measured here or elsewhere, or computed from data sheets."""
