"""Output for users: tables, progress bars, contact sheets, JSON forms."""
