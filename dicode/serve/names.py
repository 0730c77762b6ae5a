"""Files of a job, and sizes of pictures, as those who write them and those who hand them out call them.

FOLDER/jobs/ID/image.*  last_image.*  source.*  what the client sent
FOLDER/jobs/ID/CLAIM/video.mp4  video.json      the video, which can be watched while it grows; its metadata
FOLDER/jobs/ID/CLAIM/source.mp4                 of a reconstruction: what was sent, as the model sees it
FOLDER/jobs/ID/CLAIM/plan.safetensors           the deep tokens of its key frames
FOLDER/jobs/ID/CLAIM/keyframes.png  thumbnail.jpg
"""

VIDEO, SOURCE, PLAN, KEY_FRAMES, THUMBNAIL = (
    "video.mp4", "source.mp4", "plan.safetensors", "keyframes.png", "thumbnail.jpg",
)  # fmt: skip
LEAST_SIDE = 256  # pixels of a video whose size is left open
ALONE_S = 60.0  # after which a live video ends that was watched and is no longer
MOST_RECONSTRUCTED_S = 60.0  # of a longer video the beginning
