"""Raw data in the formats people have, to one typed conversation."""
