"""What `ditmoe.pipeline` is made of: a call's arguments, images drawn from images, its folder."""
