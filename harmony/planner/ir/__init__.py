"""What is planned: tasks, the schedule made of them, the policy, the plan."""
