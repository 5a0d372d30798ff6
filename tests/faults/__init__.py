"""Kills, interrupts and full disks at random moments of every command that writes."""
