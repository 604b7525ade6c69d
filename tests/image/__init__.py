"""The image: built for real, served from, and run as the pods of a rendered manifest. Root, and minutes.

MANTA_IMAGE_STORE=DIRECTORY keeps the image there, and takes the one that is there: for whoever works on these tests.
"""
