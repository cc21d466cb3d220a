"""`make evaluate`: what training has changed, measured on conversations that it has not seen, and shown by answers."""
