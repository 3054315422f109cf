"""LoRAs: trainers' names and strengths, sorted by module and merged into weights."""
