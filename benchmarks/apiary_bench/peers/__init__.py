"""The same workloads on Apiary and on other engines: `apiary bench peers`. Without torch."""
