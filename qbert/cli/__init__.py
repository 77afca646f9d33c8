"""What every command does alike: arguments, early refusals, one clear sentence for an error."""
