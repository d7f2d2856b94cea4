"""What a run is: typed, validated, free of torch."""
