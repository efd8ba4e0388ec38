"""The page on which people rate completions, and the numbers for those who look after them."""
