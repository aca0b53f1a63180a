"""What a running worker does under load: `apiary bench serve`. Without torch and without numpy."""
