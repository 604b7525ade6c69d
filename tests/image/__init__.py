"""The image: built for real, and served from. Root, and minutes.

MANTA_IMAGE_STORE=DIRECTORY keeps the image there, and takes the one that is there: for whoever works on these tests.
"""
