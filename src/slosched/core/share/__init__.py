"""What starts when where jobs share one lane: pure, for members and for virtual time."""
