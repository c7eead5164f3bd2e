"""What happens when the user calls: captures, plans, runs steps, gives results."""
