"""Optional: lowmem in other libraries. Each integration needs its library, and is imported by who uses it."""
