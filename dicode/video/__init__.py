"""Video files in and out: reading, writing, clips and their captions, contact sheets."""
