"""What a method is written in: rules, members, slots, directions, terms, and checks."""
