"""The farm: hand in prompts, watch them, fetch the pictures. No torch in here."""
