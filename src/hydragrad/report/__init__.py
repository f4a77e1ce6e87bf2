"""What people look at: measures of an answer's quality, tables, pictures."""
