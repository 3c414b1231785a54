"""From one layout, family or dtype to another."""
