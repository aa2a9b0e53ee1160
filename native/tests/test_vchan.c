/*
 * test_vchan.c - what can be shown of vchan.c where there is no Xen: arguments that are refused before any device is
 * asked, and the error of a machine without the devices. What it does with them is shown in the lab (tests/xen).
 */
#include "check.h"
#include "sa.h"

#include <errno.h>
#include <unistd.h>

int main(void)
{
	sa_vchan *vchan = NULL;

	CHECK(sa_vchan_serve(0, 11, 11, &vchan) == -EINVAL);
	CHECK(sa_vchan_serve(0, 16, 21, &vchan) == -EINVAL);
	CHECK(sa_vchan_serve(0x7ff0, 16, 16, &vchan) == -EINVAL); /* DOMID_SELF */
	CHECK(sa_vchan_serve(0x10000, 16, 16, &vchan) == -EINVAL);
	CHECK(sa_vchan_connect(0x7ff0, 8, 1, &vchan) == -EINVAL);
	CHECK(sa_vchan_connect(UINT32_MAX, 8, 1, &vchan) == -EINVAL);
	CHECK(vchan == NULL);
	if (access("/dev/xen/evtchn", F_OK) != 0) {
		CHECK(sa_vchan_serve(0, 16, 16, &vchan) == -ENOENT);
		CHECK(sa_vchan_connect(1, 8, 1, &vchan) == -ENOENT);
		CHECK(vchan == NULL);
	}
	sa_vchan_destroy(NULL);
	return check_done("test_vchan");
}
