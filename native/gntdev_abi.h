/*
 * gntdev_abi.h - what the kernel's grant device takes: Linux UAPI, include/uapi/xen/gntdev.h.
 *
 * Declared here because that header is not everywhere and cannot be included by itself. tests/test_gntdev.c compares
 * the two where it is there.
 */
#ifndef GNTDEV_ABI_H
#define GNTDEV_ABI_H

#include <stdint.h>
#include <sys/ioctl.h>

struct gntdev_ref {
	uint32_t domid;
	uint32_t ref;
};

struct gntdev_map {
	uint32_t count;
	uint32_t pad;
	uint64_t index;           /* out: offset for mmap */
	struct gntdev_ref refs[]; /* the kernel's header says one, and its ioctl number counts it */
};

struct gntdev_unmap {
	uint64_t index;
	uint32_t count;
	uint32_t pad;
};

#define GNTDEV_MAP _IOC(_IOC_NONE, 'G', 0, sizeof(struct gntdev_map) + sizeof(struct gntdev_ref))
#define GNTDEV_UNMAP _IOC(_IOC_NONE, 'G', 1, sizeof(struct gntdev_unmap))

#endif
