"""Making training data: videos to shards, on one machine or many, from and to folders, tars and object stores."""
