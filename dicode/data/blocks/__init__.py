"""`blocks`: a drawn world of coloured things, in which what a caption says can be counted in the pictures."""
