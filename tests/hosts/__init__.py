"""The farm on several hosts: network namespaces with their own hostnames, joined by links that can be cut."""
