"""What can be told of a run, beside what a program prints or shows itself."""
