"""What runs where: placements, the plan file, ownership of boundary tokens."""
