// SPDX-License-Identifier: GPL-2.0-only
/*
 * shareview: /dev/shareview. Takes the ioctls of shareview.h, looks at every argument, and tells by
 * poll() that something was let go which nobody had asked for.
 */
#include <linux/capability.h>
#include <linux/file.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <xen/interface/xen.h>

#include "internal.h"

struct sv_control {
	struct mutex lock; /* of held, among the ioctls of one descriptor */
	bool held;
	atomic64_t seen; /* sv_changes at the last SHAREVIEW_INFO */
};

static DECLARE_WAIT_QUEUE_HEAD(sv_wait);
static atomic64_t sv_changes;
static atomic_t sv_holds;

void sv_control_wake(void)
{
	atomic64_inc(&sv_changes);
	wake_up_interruptible(&sv_wait);
}

int sv_control_holds(void)
{
	return atomic_read(&sv_holds);
}

/* Take a structure whose first field is its size, which must be the one we know. */
static int sv_take(void *ret, const void __user *from, u32 size)
{
	if (copy_from_user(ret, from, size))
		return -EFAULT;
	return *(u32 *)ret == size ? 0 : -EINVAL;
}

/* -EBADF if it is no regular file of a view. */
static int sv_view_file(int number, struct fd *ret)
{
	*ret = fdget(number);
	if (!sv_fd_file(*ret))
		return -EBADF;
	if (sv_fd_file(*ret)->f_op == &sv_file_operations)
		return 0;
	fdput(*ret);
	return -EBADF;
}

static int sv_control_attach(struct shareview_attach __user *user)
{
	struct shareview_attach args;
	struct shareview_run *runs;
	struct fd fd;
	int err;

	err = sv_take(&args, user, sizeof(args));
	if (err)
		return err;
	if (args.flags || args.reserved || args.domid >= DOMID_FIRST_RESERVED ||
	    !args.runs_count || args.runs_count > SHAREVIEW_MAX_RUNS)
		return -EINVAL;
	/* Once, into our own memory: what is checked is what is used. */
	runs = kvmalloc_array(args.runs_count, sizeof(*runs), GFP_KERNEL_ACCOUNT);
	if (!runs)
		return -ENOMEM;
	err = -EFAULT;
	if (!copy_from_user(runs, u64_to_user_ptr(args.runs),
			    array_size(args.runs_count, sizeof(*runs))))
		err = sv_view_file(args.fd, &fd);
	if (!err) {
		args.compared = 0;
		err = sv_attach(sv_fd_file(fd), &args, runs, &args.compared);
		fdput(fd);
		/*
		 * Attached is attached, even if the caller's memory has gone: as with any answer.
		 */
		if (put_user(args.compared, &user->compared) && !err)
			err = -EFAULT;
	}
	kvfree(runs);
	return err;
}

static int sv_control_detach(struct shareview_detach __user *user)
{
	struct shareview_detach args;
	struct fd fd;
	int err;

	err = sv_take(&args, user, sizeof(args));
	if (!err && args.fd == -1) {
		sv_detach_all(NULL);
		return 0;
	}
	if (!err)
		err = sv_view_file(args.fd, &fd);
	if (err)
		return err;
	err = sv_detach(file_inode(sv_fd_file(fd)));
	fdput(fd);
	return err;
}

static int sv_control_state(struct shareview_state __user *user)
{
	struct shareview_state args;
	struct fd fd;
	int err;

	err = sv_take(&args, user, sizeof(args));
	if (!err)
		err = sv_view_file(args.fd, &fd);
	if (err)
		return err;
	sv_state(file_inode(sv_fd_file(fd)), &args);
	fdput(fd);
	return copy_to_user(user, &args, sizeof(args)) ? -EFAULT : 0;
}

static int sv_control_info(struct sv_control *control, struct shareview_info __user *user)
{
	struct shareview_info args;
	u64 changes;
	int err;

	err = sv_take(&args, user, sizeof(args));
	if (err)
		return err;
	memset(&args, 0, sizeof(args));
	args.size = sizeof(args);
	changes = atomic64_read(&sv_changes); /* before: a change meanwhile is told again */
	smp_rmb();
	sv_info(&args);
	if (copy_to_user(user, &args, sizeof(args)))
		return -EFAULT;
	atomic64_set(&control->seen, changes);
	return 0;
}

static int sv_control_hold(struct sv_control *control, const struct shareview_hold __user *user)
{
	struct shareview_hold args;
	int err;

	err = sv_take(&args, user, sizeof(args));
	if (err)
		return err;
	if (args.hold > 1)
		return -EINVAL;
	mutex_lock(&control->lock);
	if (control->held != args.hold)
		atomic_add(args.hold ? 1 : -1, &sv_holds);
	control->held = args.hold;
	mutex_unlock(&control->lock);
	return 0;
}

static long sv_control_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	void __user *user = (void __user *)argument;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	switch (command) {
	case SHAREVIEW_INFO:
		return sv_control_info(file->private_data, user);
	case SHAREVIEW_ATTACH:
		return sv_control_attach(user);
	case SHAREVIEW_DETACH:
		return sv_control_detach(user);
	case SHAREVIEW_STATE:
		return sv_control_state(user);
	case SHAREVIEW_HOLD:
		return sv_control_hold(file->private_data, user);
	}
	return -ENOTTY;
}

static __poll_t sv_control_poll(struct file *file, struct poll_table_struct *table)
{
	struct sv_control *control = file->private_data;

	poll_wait(file, &sv_wait, table);
	return atomic64_read(&sv_changes) == atomic64_read(&control->seen) ? 0 : EPOLLIN;
}

static int sv_control_open(struct inode *inode, struct file *file)
{
	struct sv_control *control;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	control = kzalloc(sizeof(*control), GFP_KERNEL_ACCOUNT);
	if (!control)
		return -ENOMEM;
	mutex_init(&control->lock);
	atomic64_set(&control->seen, atomic64_read(&sv_changes));
	file->private_data = control;
	return nonseekable_open(inode, file);
}

static int sv_control_release(struct inode *inode, struct file *file)
{
	struct sv_control *control = file->private_data;

	if (control->held)
		atomic_dec(&sv_holds);
	kfree(control);
	return 0;
}

static const struct file_operations sv_control_operations = {
	.owner = THIS_MODULE,
	.open = sv_control_open,
	.release = sv_control_release,
	.unlocked_ioctl = sv_control_ioctl,
	.compat_ioctl = compat_ptr_ioctl, /* the structures are the same for 32 bits */
	.poll = sv_control_poll,
};

static struct miscdevice sv_control_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "shareview",
	.fops = &sv_control_operations,
	.mode = 0600,
};

int sv_control_init(void)
{
	return misc_register(&sv_control_device);
}

void sv_control_exit(void)
{
	misc_deregister(&sv_control_device);
}
