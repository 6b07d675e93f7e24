"""Results for people: tables of measured points and of replays."""
