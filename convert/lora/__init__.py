"""LoRAs: read under any trainer's names, sorted by module and merged into the weights."""
