"""What differs between hosts with Xen and without, for the broker's loop."""
