"""What reports are made of: self-contained pages, charts, pictures with boxes drawn. Knows no model and no data."""
