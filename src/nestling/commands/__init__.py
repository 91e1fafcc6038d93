"""What each command does, behind the options that ``cli`` reads."""
