"""What people look at: tables, bars, contact sheets, JSON forms."""
