"""What people see of a `Result`: terminal tables, CSV rows and the HTML report."""
