"""Dense attention beside sparse: one video twice, how far apart the two are, and in what time."""
