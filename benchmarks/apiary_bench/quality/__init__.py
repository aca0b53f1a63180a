"""What cache policies cost in quality, at equal average bytes: `apiary bench quality`."""
