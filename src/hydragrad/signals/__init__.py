"""What a recorded run says of its own examples: signals of wrong labels, one number an example, higher: worse."""
