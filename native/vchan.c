/*
 * vchan.c - two byte rings and an event channel between two Xen domains, through Linux's devices for user space:
 * xen/gntalloc (server: pages of ours that the peer may map), xen/gntdev (client: the peer's pages) and xen/evtchn.
 *
 * What lies in the pages is ring.c's. Where a server's grant reference and port are made known is xenstore's.
 * The devices are asked by raw ioctls: libxenvchan is not needed, on neither side. The kernel clears our "live" byte and
 * sends an event when our mapping goes, however the process ends (SET_UNMAP_NOTIFY), so a peer learns of a kill -9.
 * Limit: nobody tells us that a domain was destroyed; its pages stay mapped and silent. Whoever knows must say so.
 */
#include "ring.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

/* Linux UAPI: include/uapi/xen/{gntalloc,gntdev,evtchn}.h. Those headers do not compile by themselves in user space
 * (domid_t, grant_ref_t), and Xen's own copies of them may lie in the same place. */
struct gntalloc_alloc {
	uint16_t domid;
	uint16_t flags;
	uint32_t count;
	uint64_t index;    /* out: offset for mmap */
	uint32_t grefs[1]; /* out: count of them */
};
struct unmap_notify {   /* the same for gntalloc and gntdev */
	uint64_t index; /* of the byte */
	uint32_t action;
	uint32_t port;
};
struct grant {
	uint32_t domid;
	uint32_t ref;
};
struct gntdev_map {
	uint32_t count;
	uint32_t pad;
	uint64_t index; /* out: offset for mmap */
	struct grant grants[1];
};
struct bind_interdomain {
	uint32_t domid;
	uint32_t port;
};
struct bind_unbound {
	uint32_t domid;
};
struct notify {
	uint32_t port;
};

#define GNTALLOC_ALLOC _IOC(_IOC_NONE, 'G', 5, sizeof(struct gntalloc_alloc))
#define GNTDEV_MAP _IOC(_IOC_NONE, 'G', 0, sizeof(struct gntdev_map))
#define SET_UNMAP_NOTIFY _IOC(_IOC_NONE, 'G', 7, sizeof(struct unmap_notify))
#define EVTCHN_BIND_INTERDOMAIN _IOC(_IOC_NONE, 'E', 1, sizeof(struct bind_interdomain))
#define EVTCHN_BIND_UNBOUND _IOC(_IOC_NONE, 'E', 2, sizeof(struct bind_unbound))
#define EVTCHN_NOTIFY _IOC(_IOC_NONE, 'E', 4, sizeof(struct notify))

_Static_assert(sizeof(struct gntalloc_alloc) == 24 && sizeof(struct gntdev_map) == 24 &&
                       sizeof(struct unmap_notify) == 16,
               "the sizes are part of the ioctl numbers");

enum {
	GNTALLOC_WRITABLE = 1,
	UNMAP_CLEAR_BYTE = 1,
	UNMAP_SEND_EVENT = 2,
	FIRST_RESERVED_DOMID = 0x7ff0, /* DOMID_FIRST_RESERVED of Xen */
	MAX_PAGES = 1 + 2 * RING_MAX_PAGES
};

struct mapping {
	uint8_t *base; /* NULL: none */
	size_t bytes;
};

struct sa_vchan {
	sa_ring *ring;
	int event_fd;
	int memory_fd; /* gntalloc or gntdev */
	uint32_t ring_ref;
	uint32_t port;
	struct mapping control, left, right; /* a server has all in one: control */
	bool met;                            /* the peer can see us: it is told when we go */
};

/* ---------------------------------------------------------------------------------------------------- lifetimes */

static sa_vchan *vchan_new(void)
{
	sa_vchan *vchan = malloc(sizeof *vchan);

	if (vchan)
		*vchan = (sa_vchan){.event_fd = -1, .memory_fd = -1};
	return vchan;
}

static int notify(const sa_vchan *vchan)
{
	struct notify request = {.port = vchan->port};

	return ioctl(vchan->event_fd, EVTCHN_NOTIFY, &request) < 0 ? -errno : 0;
}

static void unmap(struct mapping *mapping)
{
	/* A whole mapping of our own: it cannot fail in a way that leaves something. */
	if (mapping->base)
		(void)munmap(mapping->base, mapping->bytes);
	mapping->base = NULL;
}

void sa_vchan_destroy(sa_vchan *vchan)
{
	if (vchan == NULL)
		return;
	if (vchan->met) {
		sa_ring_hang_up(vchan->ring);
		/* If it fails, the kernel's own event follows with the mapping. */
		(void)notify(vchan);
	}
	sa_ring_destroy(vchan->ring);
	unmap(&vchan->left);
	unmap(&vchan->right);
	unmap(&vchan->control);
	/* Memory before the event channel: the kernel holds the port for its unmap notification, and sends it now. */
	if (vchan->memory_fd >= 0)
		(void)close(vchan->memory_fd);
	if (vchan->event_fd >= 0)
		(void)close(vchan->event_fd);
	free(vchan);
}

static void vchan_drop(sa_vchan **vchan)
{
	sa_vchan_destroy(*vchan);
}

#define VCHAN_SCOPE __attribute__((cleanup(vchan_drop))) sa_vchan *

static sa_vchan *vchan_keep(sa_vchan **vchan)
{
	sa_vchan *kept = *vchan;

	*vchan = NULL;
	return kept;
}

/* ------------------------------------------------------------------------------------------------- the devices */

static int open_device(const char *path, int flags, int *ret_fd)
{
	*ret_fd = open(path, O_RDWR | O_CLOEXEC | flags);
	return *ret_fd < 0 ? -errno : 0;
}

/* An ioctl that returns a port. */
static int bind_port(int fd, unsigned long request, void *argument, uint32_t *ret_port)
{
	const int port = ioctl(fd, request, argument);

	if (port < 0)
		return -errno;
	*ret_port = (uint32_t)port;
	return 0;
}

static int map_pages(int fd, uint64_t index, uint32_t npages, int protection, struct mapping *ret)
{
	const size_t bytes = (size_t)npages * SA_PAGE_SIZE;
	void *base = mmap(NULL, bytes, protection, MAP_SHARED, fd, (off_t)index);

	if (base == MAP_FAILED)
		return -errno;
	*ret = (struct mapping){.base = base, .bytes = bytes};
	/* A child would hold the pages, and hold back the news of our end, for as long as it lives. */
	return madvise(base, bytes, MADV_DONTFORK) < 0 ? -errno : 0;
}

static int clear_when_unmapped(const sa_vchan *vchan, uint64_t index, size_t byte)
{
	struct unmap_notify request = {
		.index = index + byte,
		.action = UNMAP_CLEAR_BYTE | UNMAP_SEND_EVENT,
		.port = vchan->port,
	};

	return ioctl(vchan->memory_fd, SET_UNMAP_NOTIFY, &request) < 0 ? -errno : 0;
}

/* ------------------------------------------------------------------------------------------------------- server */

static int allocate(int fd, uint32_t domid, uint32_t npages, uint64_t *ret_index, uint32_t *ret_grefs)
{
	uint64_t buffer[(offsetof(struct gntalloc_alloc, grefs) + MAX_PAGES * sizeof(uint32_t) + 7) / 8] = {0};
	struct gntalloc_alloc *request = (struct gntalloc_alloc *)(void *)buffer;

	request->domid = (uint16_t)domid;
	request->flags = GNTALLOC_WRITABLE;
	request->count = npages;
	if (ioctl(fd, GNTALLOC_ALLOC, request) < 0)
		return -errno;
	*ret_index = request->index;
	memcpy(ret_grefs, (uint8_t *)buffer + offsetof(struct gntalloc_alloc, grefs), npages * sizeof(uint32_t));
	return 0;
}

int sa_vchan_serve(uint32_t domid, uint32_t read_order, uint32_t write_order, sa_vchan **ret)
{
	VCHAN_SCOPE vchan = NULL;
	struct bind_unbound request = {.domid = domid};
	uint32_t grefs[MAX_PAGES];
	uint32_t left;
	uint32_t right;
	uint64_t index = 0;
	uint8_t *base;
	int error = sa_ring_pages(read_order, write_order, &left, &right);

	*ret = NULL;
	if (error)
		return error;
	if (domid >= FIRST_RESERVED_DOMID)
		return -EINVAL;
	vchan = vchan_new();
	if (vchan == NULL)
		return -ENOMEM;
	error = open_device("/dev/xen/evtchn", O_NONBLOCK, &vchan->event_fd);
	if (!error)
		error = open_device("/dev/xen/gntalloc", 0, &vchan->memory_fd);
	if (!error)
		error = bind_port(vchan->event_fd, EVTCHN_BIND_UNBOUND, &request, &vchan->port);
	if (!error)
		error = allocate(vchan->memory_fd, domid, 1 + left + right, &index, grefs);
	if (!error)
		error = map_pages(vchan->memory_fd, index, 1 + left + right, PROT_READ | PROT_WRITE, &vchan->control);
	if (error)
		return error;
	vchan->ring_ref = grefs[0];
	base = vchan->control.base;
	/* The peer may guess the references and look on: srv_live is the last byte that it finds set. */
	error = sa_ring_format(base, read_order, write_order, grefs + 1);
	if (!error)
		error = sa_ring_create(SA_RING_SERVER, base, left ? base + SA_PAGE_SIZE : NULL,
		                       right ? base + (1 + (size_t)left) * SA_PAGE_SIZE : NULL, read_order, write_order,
		                       &vchan->ring);
	if (!error)
		error = clear_when_unmapped(vchan, index, offsetof(struct ring_control, srv_live));
	if (error)
		return error;
	vchan->met = true;
	*ret = vchan_keep(&vchan);
	return 0;
}

/* ------------------------------------------------------------------------------------------------------- client */

static int map_grants(int fd, uint32_t domid, const uint32_t *grefs, uint32_t npages, int protection,
                      uint64_t *ret_index, struct mapping *ret)
{
	uint64_t buffer[(offsetof(struct gntdev_map, grants) + RING_MAX_PAGES * sizeof(struct grant) + 7) / 8] = {0};
	struct gntdev_map *request = (struct gntdev_map *)(void *)buffer;
	uint8_t *at = (uint8_t *)buffer + offsetof(struct gntdev_map, grants);

	request->count = npages;
	for (uint32_t i = 0; i < npages; i++, at += sizeof(struct grant)) {
		const struct grant grant = {.domid = domid, .ref = grefs[i]};

		memcpy(at, &grant, sizeof grant);
	}
	if (ioctl(fd, GNTDEV_MAP, request) < 0)
		return -errno;
	*ret_index = request->index;
	return map_pages(fd, request->index, npages, protection, ret);
}

int sa_vchan_connect(uint32_t domid, uint32_t ring_ref, uint32_t port, sa_vchan **ret)
{
	VCHAN_SCOPE vchan = NULL;
	struct bind_interdomain request = {.domid = domid, .port = port};
	struct ring_offer offer;
	uint64_t index = 0;
	uint64_t rest;
	int error;

	*ret = NULL;
	if (domid >= FIRST_RESERVED_DOMID)
		return -EINVAL;
	vchan = vchan_new();
	if (vchan == NULL)
		return -ENOMEM;
	vchan->ring_ref = ring_ref;
	error = open_device("/dev/xen/evtchn", O_NONBLOCK, &vchan->event_fd);
	if (!error)
		error = open_device("/dev/xen/gntdev", 0, &vchan->memory_fd);
	if (!error)
		error = map_grants(vchan->memory_fd, domid, &ring_ref, 1, PROT_READ | PROT_WRITE, &index,
		                   &vchan->control);
	if (!error)
		error = ring_read_offer((const struct ring_control *)(const void *)vchan->control.base, &offer);
	if (!error)
		error = bind_port(vchan->event_fd, EVTCHN_BIND_INTERDOMAIN, &request, &vchan->port);
	if (!error && offer.left_pages)
		error = map_grants(vchan->memory_fd, domid, offer.grants, offer.left_pages, PROT_READ | PROT_WRITE,
		                   &rest, &vchan->left);
	if (!error && offer.right_pages)
		error = map_grants(vchan->memory_fd, domid, offer.grants + offer.left_pages, offer.right_pages,
		                   PROT_READ, &rest, &vchan->right);
	if (!error)
		error = sa_ring_create(SA_RING_CLIENT, vchan->control.base, vchan->left.base, vchan->right.base,
		                       offer.left_order, offer.right_order, &vchan->ring);
	/* From here on, our end is told to the server, whatever ends us. */
	if (!error)
		error = clear_when_unmapped(vchan, index, offsetof(struct ring_control, cli_live));
	if (error)
		return error;
	sa_ring_connect(vchan->ring);
	vchan->met = true;
	error = notify(vchan);
	if (error)
		return error;
	*ret = vchan_keep(&vchan);
	return 0;
}

/* ------------------------------------------------------------------------------------------------------- in use */

int sa_vchan_fd(const sa_vchan *vchan)
{
	return vchan->event_fd;
}

uint32_t sa_vchan_ring_ref(const sa_vchan *vchan)
{
	return vchan->ring_ref;
}

uint32_t sa_vchan_port(const sa_vchan *vchan)
{
	return vchan->port;
}

int sa_vchan_drain(sa_vchan *vchan, int *ret_pending)
{
	uint32_t port;
	ssize_t n;

	*ret_pending = 0;
	n = read(vchan->event_fd, &port, sizeof port);
	if (n < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -errno;
	if (n != sizeof port)
		return -EIO;
	*ret_pending = 1;
	/* The device holds further events back until the port is written to it. */
	return write(vchan->event_fd, &port, sizeof port) == sizeof port ? 0 : -EIO;
}

int sa_vchan_state(sa_vchan *vchan)
{
	return sa_ring_state(vchan->ring);
}

int sa_vchan_read(sa_vchan *vchan, uint8_t *ret_bytes, size_t max, size_t *ret_n)
{
	int wanted;
	const int error = sa_ring_read(vchan->ring, ret_bytes, max, ret_n, &wanted);

	if (error)
		return error;
	return wanted ? notify(vchan) : 0;
}

int sa_vchan_write(sa_vchan *vchan, const uint8_t *bytes, size_t max, size_t *ret_n)
{
	int wanted;
	const int error = sa_ring_write(vchan->ring, bytes, max, ret_n, &wanted);

	if (error)
		return error;
	return wanted ? notify(vchan) : 0;
}
