"""The commands of `sterna`, one file for each or for a few that share what they print."""
