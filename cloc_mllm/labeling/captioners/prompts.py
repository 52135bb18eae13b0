"""What models are asked, in words of our own."""

DESCRIBE = "Describe this image in detail. Name everything that can be seen in it, with colours, materials and places."

FUSE = (
    "Two texts belong to one image.\n"
    "Seen in the image: {caption}\n"
    "Found beside it: {alt_text}\n"
    "Write one description of the image. Keep all that is seen in it. From the text beside it take only names and "
    "facts about what is seen; leave out offers, dates, addresses and file names. Answer with the description alone."
)
