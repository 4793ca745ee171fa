"""What an operator asks for at the command line, one file a command."""
