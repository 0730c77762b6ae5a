"""`blocks`: a drawn world of coloured objects, in which what a caption says can be counted in the pictures."""
